"""The quickstart's instrument: a small world told in two languages, and a small base model that speaks one."""
