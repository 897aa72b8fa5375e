"""New pieces: the old language is cut up as before, the new one into fewer tokens, and nothing else changes."""

import json

import pytest
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer
from vocabulary_fixtures import BASQUE, ENGLISH, KINDS, KOREAN, byte_fallback, byte_level, texts, tokenizer_of

from elo.data.tokenizer import save_with_backend
from elo.errors import EloError
from elo.vocab.pieces import PieceLearner, compare_tokenizers, extend_tokenizer, require_old_ids
from elo.vocab.words import Spelling, measure_fertility, split_words

TARGET = texts(KOREAN, 150, 1)
SOURCE = texts(ENGLISH, 150, 2, quoted=KOREAN)
NEW_TARGET, NEW_SOURCE = texts(KOREAN, 60, 3), texts(ENGLISH, 60, 4)


def learn_extension(backend: Tokenizer, target, source, count: int):
    return PieceLearner(backend, target, [source], count).extension(count)


def extended(backend: Tokenizer, count: int = 60, target=TARGET, source=SOURCE):
    extension = learn_extension(backend, target, source, count)
    return extension, extend_tokenizer(backend, extension)


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_cut_up_as_before_and_the_target_into_fewer_tokens(kind):
    old = tokenizer_of(kind).backend_tokenizer
    extension, new = extended(old)
    for text in NEW_SOURCE:
        assert new.encode(text).ids == old.encode(text).ids
    before, after = measure_fertility(old, NEW_TARGET), measure_fertility(new, NEW_TARGET)
    assert before.bytes == after.bytes
    assert after.tokens < 0.5 * before.tokens
    used = {index for text in NEW_TARGET for index in new.encode(text).ids}
    assert len(used - set(old.get_vocab().values())) >= 12, "new pieces are used; others were steps towards them"
    assert len(extension.pieces) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_from_its_tokens(kind):
    new = extended(tokenizer_of(kind).backend_tokenizer)[1]
    for text in [*NEW_TARGET[:20], *NEW_SOURCE[:20], "mixed 강물 text, 돌다리."]:
        assert new.decode(new.encode(text, add_special_tokens=False).ids).strip() == text


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_by_transformers_it_is_the_same(kind, tmp_path):
    old = tokenizer_of(kind)
    old.save_pretrained(tmp_path / "old")
    new = extended(old.backend_tokenizer)[1]
    save_with_backend(tmp_path / "old", new, tmp_path / "new")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    require_old_ids(old.backend_tokenizer, loaded.backend_tokenizer, "new")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "additional_special_tokens_ids"):
        assert getattr(loaded, name, None) == getattr(old, name, None)
    for text in [*NEW_TARGET[:10], *NEW_SOURCE[:10], "a<|im_end|>b"]:
        assert loaded(text)["input_ids"] == loaded.backend_tokenizer.encode(text).ids
        assert loaded(text, add_special_tokens=False)["input_ids"] == new.encode(text, add_special_tokens=False).ids
    assert loaded("the")["input_ids"] == old("the")["input_ids"], "specials included"


def test_a_language_of_the_same_script_leaves_the_words_of_the_source_alone():
    old = byte_level()
    new = extended(old, target=texts(BASQUE, 150, 5))[1]
    assert (
        measure_fertility(new, texts(BASQUE, 30, 6)).tokens < 0.8 * measure_fertility(old, texts(BASQUE, 30, 6)).tokens
    )
    assert compare_tokenizers(old, new, NEW_SOURCE).identical == len(NEW_SOURCE)


def test_words_that_change_are_told_from_quotations():
    old = byte_level()
    new = extended(old)[1]
    quoting = [*NEW_SOURCE, "They crossed the 돌다리 again."]
    found = compare_tokenizers(old, new, quoting)
    assert (found.documents, found.identical, found.foreign) == (61, 60, 1)
    assert found.holds
    careless = extended(old, source=["nothing"], target=texts(BASQUE, 150, 5) + SOURCE)[1]
    found = compare_tokenizers(old, careless, NEW_SOURCE)
    assert not found.holds
    assert any(word.strip().lower() in ENGLISH for word in found.words)


def test_one_training_gives_extensions_of_every_size():
    for backend in (byte_level(), byte_fallback()):
        learner = PieceLearner(backend, TARGET, [SOURCE], 60)
        small = learner.extension(30)
        assert small == learn_extension(backend, TARGET, SOURCE, 30)
        assert learner.extension(60) == learn_extension(backend, TARGET, SOURCE, 60)
        assert len(small.pieces) == 30


def test_learning_is_deterministic_and_never_makes_half_a_word_of_another_kind():
    extension = learn_extension(byte_level(), TARGET, SOURCE, 80)
    assert extension == learn_extension(byte_level(), TARGET, SOURCE, 80)
    text = Spelling(byte_level()).text
    for piece in extension.pieces:
        assert not any(character.isdigit() or character in ".,!\n" for character in text(piece)), piece


def test_missing_characters_become_pieces_where_bytes_stood_for_them():
    old = byte_fallback()
    extension, new = extended(old, 120)
    characters = [piece for piece in extension.pieces if len(piece) == 1]
    assert 0 < len(characters) <= 60, "at most half of the pieces"
    assert set(characters) <= set("".join(KOREAN))
    assert list(extension.pieces[: len(characters)]) == characters, "they come first"
    assert "<0x" not in "".join(new.encode("강물 돌다리").tokens)


def test_old_ids_stay_even_of_special_tokens_after_the_vocabulary():
    old = tokenizer_of("qwen").backend_tokenizer
    new = extended(old)[1]
    require_old_ids(old, new, "new")
    assert new.encode("<|im_start|>the<|im_end|>").ids == old.encode("<|im_start|>the<|im_end|>").ids
    assert sorted(new.get_vocab().values()) == list(range(new.get_vocab_size())), "no id twice, no gap"


def test_a_piece_never_takes_the_place_of_an_added_token():
    old = byte_level()
    old.add_tokens(["etxea", "zubian"])
    new = extended(old, target=[text.replace(" ", "\n") for text in texts(BASQUE, 150, 5)])[1]
    require_old_ids(old, new, "new")


@pytest.mark.parametrize("character", ["々", "ー", "ª", "µ", "Ａ"])
def test_letters_of_several_scripts_are_nobodys_quotation(character):
    """They are rare in the source, but its own: the pairs they make stay as they are."""
    source = [*SOURCE, f"the a{character}b sat"]
    new = extended(byte_level(), target=[f"a{character}b" for _ in range(50)] + TARGET, source=source)[1]
    for word in (f"a{character}b", f" a{character}b"):
        assert new.encode(word).ids == byte_level().encode(word).ids


def test_white_space_and_control_characters_become_no_pieces():
    old = byte_fallback()
    extension = learn_extension(old, [text.replace(" ", "\n\t") for text in TARGET], [" ".join(ENGLISH)] * 3, 60)
    assert not {"\n", "\t", "\x00"} & set(extension.pieces)


def test_another_tokenizer_is_no_extension():
    with pytest.raises(EloError, match="keeps all old ids"):
        require_old_ids(byte_level(), byte_level(KOREAN), "other")


@pytest.mark.parametrize("model", [models.Unigram, models.WordPiece, models.WordLevel])
def test_what_has_no_merges_is_refused(model):
    tokenizer = Tokenizer(model())
    if model is models.Unigram:
        tokenizer.train_from_iterator(TARGET, trainers.UnigramTrainer(vocab_size=200, show_progress=False))
    with pytest.raises(EloError, match=f"{model.__name__} tokenizer.*--tokenizer"):
        learn_extension(tokenizer, TARGET, SOURCE, 10)


@pytest.mark.parametrize(
    ("change", "said"), [({"end_of_word_suffix": "</w>"}, "place in the word"), ({"dropout": 0.1}, "at random")]
)
def test_byte_pairs_that_cannot_be_continued_are_refused(change, said):
    state = json.loads(byte_level().to_str())
    state["model"] |= change
    with pytest.raises(EloError, match=said):
        learn_extension(Tokenizer.from_str(json.dumps(state)), TARGET, SOURCE, 10)


def test_text_without_anything_to_learn_is_told():
    with pytest.raises(EloError, match="empty"):
        learn_extension(byte_level(), [], SOURCE, 10)
    with pytest.raises(EloError, match="no new piece"):
        learn_extension(byte_level(), NEW_SOURCE, NEW_SOURCE, 10)


def test_words_are_what_no_token_spans():
    for backend in (byte_level(), byte_fallback()):
        for text in [*NEW_SOURCE[:10], *NEW_TARGET[:10]]:
            words = list(split_words(backend, text))
            joined = [token.value for word in words for token in backend.model.tokenize(word)]
            assert joined == backend.encode(text, add_special_tokens=False).tokens


def test_each_of_several_languages_keeps_its_words():
    """However small one is beside the others: its script is its own."""
    few = texts(KOREAN[:5], 2, 7)
    old = byte_level()
    new = extend_tokenizer(old, PieceLearner(old, TARGET, [SOURCE * 20, few], 60).extension(60))
    for text in few:
        assert new.encode(text).ids == old.encode(text).ids


def test_text_without_any_token_is_told():
    nothing = Tokenizer(models.BPE())
    with pytest.raises(EloError, match="have no tokens"):
        measure_fertility(nothing, ["강물"])


def test_fertility_counts():
    measured = measure_fertility(byte_level(), ["the cat", "강물"])
    assert (measured.documents, measured.bytes, measured.characters, measured.words) == (2, 13, 9, 3)
    assert measured.bytes_per_token == 13 / measured.tokens
    assert measured.tokens_per_word == measured.tokens / 3
