"""What `elo quickstart` runs on: a small world told in two languages, and a small base model that speaks one of them."""
