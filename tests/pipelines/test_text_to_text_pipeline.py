"""Texts that answer texts: against the model's own `generate` and `beam_search`, and against the pipeline's stream."""

import json

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import shared_model
from tiny_text_to_text import CONTEXT_LENGTH, SOURCES, tiny_t5, tiny_tokenizer

from lmzoo.cli import main
from lmzoo.pipelines import TextGenerator, TextToText, load_pipeline

NEW = 10
PREFIX = "the cat: "


def pipeline(**settings_):
    return TextToText(tiny_t5(), tiny_tokenizer(), NEW, PREFIX, **settings_)


@pytest.fixture(scope="module")
def greedy():
    return pipeline()


@pytest.fixture(scope="module")
def sampler():
    return pipeline(temperature=1.2, top_k=20)


@pytest.fixture(scope="module")
def searcher():
    return pipeline(num_beams=4, num_return_sequences=3, length_penalty=0.6)


def read(texts):
    end = tiny_tokenizer().eos_token_id
    return [[*tiny_tokenizer().encode(PREFIX + text)[: CONTEXT_LENGTH - 1], end] for text in texts]


def text_of(token_ids):
    """The text of a row of new tokens; the model has more tokens than the tokenizer, and those have none."""
    token_ids = token_ids.tolist()
    end = tiny_tokenizer().eos_token_id
    token_ids = token_ids[: token_ids.index(end)] if end in token_ids else token_ids
    return tiny_tokenizer().decode([token for token in token_ids if token < tiny_tokenizer().vocab_size])


def answers(texts, **options):
    return [text_of(row) for row in tiny_t5().generate(read(texts), NEW, **options).numpy()]


def test_the_text_is_that_of_the_ids_that_generate_gives(greedy, sampler, searcher):
    expected = answers(SOURCES, temperature=0)
    assert greedy(SOURCES) == expected
    assert len(set(expected)) > len(SOURCES) / 2, "the model must tell the texts apart"
    drawn = answers(SOURCES, temperature=1.2, top_k=20, seed=5)
    assert sampler(SOURCES, seed=5) == drawn != expected
    assert searcher(SOURCES) == answers(SOURCES, num_beams=4, length_penalty=0.6)


def test_the_best_come_with_their_scores(searcher):
    found = tiny_t5().beam_search(read(SOURCES), NEW, num_beams=4, num_return_sequences=3, length_penalty=0.6)
    n_best = searcher.n_best(SOURCES)
    for row, token_ids, scores in zip(n_best, found.token_ids.numpy(), found.scores.numpy(), strict=True):
        assert [each["text"] for each in row] == [text_of(ids) for ids in token_ids]
        assert [each["score"] for each in row] == pytest.approx(scores.tolist(), abs=1e-5)
    assert [each["text"] for each in searcher.n_best(SOURCES[0])] == [each["text"] for each in n_best[0]]
    assert [row[0]["text"] for row in n_best] == searcher(SOURCES)


def test_one_beam_has_no_n_best_and_many_no_stream(greedy, searcher):
    with pytest.raises(ValueError, match="num_beams is 1, which is no search"):
        greedy.n_best("a")
    with pytest.raises(ValueError, match="num_beams is 4, and a beam search knows a text when it has ended"):
        searcher.stream("a")
    with pytest.raises(ValueError, match=r"num_beams is 2 and temperature 0.7, but a beam search draws nothing"):
        pipeline(num_beams=2, temperature=0.7)


def test_a_str_gives_a_str_a_list_a_list_and_a_tensor_a_tensor(greedy, searcher):
    for each in (greedy, searcher):
        texts = each(SOURCES)
        assert [each(SOURCES[0]), each(SOURCES[2])] == [texts[0], texts[2]]
        assert each(iter(SOURCES)) == texts
        tensor = each(tf.constant(SOURCES))
        assert [text.decode() for text in tensor.numpy()] == texts
        assert each([]) == []
        assert each(tf.zeros([0], tf.string)).shape == [0]


def test_a_stream_gives_the_text_of_the_call(sampler):
    for seed, text in enumerate(SOURCES[:4]):
        assert "".join(sampler.stream(text, seed=seed)) == sampler(text, seed=seed)
    assert "".join(sampler.stream(text, seed=1, max_new_tokens=3)) == sampler(text, seed=1, max_new_tokens=3)


def test_bytes_that_are_no_utf8_are_replaced(greedy):
    broken = [b"caf\xc3", b"\xff\xfe", b"\xed\xa0\x80"]
    served = greedy(tf.constant(broken)).numpy()
    assert [text.decode() for text in served] == greedy([text.decode(errors="replace") for text in broken])


def test_rules_of_generation_hold():
    word = tiny_tokenizer().token_to_id("▁th")
    forced = pipeline(forced_bos_token_id=word, bad_words_ids=[[3]], min_new_tokens=4, num_beams=3)
    assert forced(SOURCES) == answers(
        SOURCES, num_beams=3, forced_bos_token_id=word, bad_words_ids=((3,),), min_new_tokens=4
    )
    assert all(text.startswith("th") for text in forced(SOURCES))


def test_a_stop_string_ends_a_text(greedy):
    texts = greedy(SOURCES)
    stop = next(text for text in texts if len(text) > 3)[2:4]
    assert pipeline(stop_strings=stop)(SOURCES) == [text.split(stop)[0] for text in texts]


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(st.text("the \n漢😀é</s>", max_size=30), min_size=1, max_size=3))
def test_any_texts_get_the_answers_of_generate(greedy, texts):
    assert greedy(texts) == answers(texts, temperature=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be an integer of 1 or more"),
        ({"max_length": 0}, "max_length is 0, but must be an integer of 1 or more"),
        ({"num_beams": 0}, "num_beams=0 with num_beams=0: must be"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 with num_beams=2"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TextToText(tiny_t5(), tiny_tokenizer(), **options)


def test_what_does_not_answer_texts_is_refused():
    with pytest.raises(ValueError, match="GPTModel does not answer texts"):
        TextToText(shared_model(), tiny_tokenizer())
    with pytest.raises(ValueError, match="T5Model does not continue texts"):
        TextGenerator(tiny_t5(), tiny_tokenizer())


def save(directory, **files):
    tiny_t5().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    for name, content in files.items():
        file = directory / f"{name}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(old | content))


def test_a_checkpoint_brings_its_prefix_and_its_settings(tmp_path, searcher):
    save(
        tmp_path,
        config={"prefix": PREFIX, "num_beams": 2},
        generation_config={"num_beams": 4, "length_penalty": 0.6, "max_new_tokens": NEW, "temperature": 0.3},
    )
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is TextToText
    assert loaded(SOURCES) == searcher(SOURCES)
    other = TextToText.from_pretrained(tmp_path, num_beams=1, prefix="")
    assert (other.beams.num_beams, other.prefix, other.max_new_tokens) == (1, "", NEW)
    save(tmp_path, generation_config={"do_sample": True, "top_k": 7})
    drawn = TextToText.from_pretrained(tmp_path, num_beams=1)
    assert (drawn.options.temperature, drawn.options.top_k) == (0.3, 7)


@pytest.mark.slow
def test_the_command_answers_as_the_checkpoint_says(tmp_path, searcher, capsys):
    save(tmp_path, config={"prefix": PREFIX, "num_beams": 4, "length_penalty": 0.6, "max_new_tokens": NEW})
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), SOURCES[0]])
    assert capsys.readouterr().out == searcher(SOURCES[0]) + "\n"


@pytest.mark.slow
def test_the_command_takes_flags(tmp_path, sampler, capsys):
    save(tmp_path, config={"num_beams": 4})
    flags = ["--prefix", PREFIX, "--max-new-tokens", str(NEW), "--temperature", "1.2", "--top-k", "20", "--seed", "3"]
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), SOURCES[0], *flags])
    assert "num_beams is 4 and temperature 1.2" in capsys.readouterr().err
    save(tmp_path, config={"num_beams": 1})
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path), SOURCES[0], *flags])
    assert capsys.readouterr().out == sampler(SOURCES[0], seed=3) + "\n"
