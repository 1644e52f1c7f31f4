"""Strings in, strings out: against the model's own `generate`, against a script, and against its own stream."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import CONTEXT_LENGTH, PROMPTS, ScriptedModel, shared_model, tiny_model, tiny_tokenizer

from lmzoo.checkpoints import CheckpointError
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.generation import SamplingOptions
from lmzoo.models.bert import BertModel
from lmzoo.pipelines import TextGenerator

NEW = 12
STOPS = ("ab", "b  a", "é", "字😀", "aba\n")


@pytest.fixture(scope="module")
def greedy():
    return TextGenerator(shared_model(), tiny_tokenizer(), NEW, temperature=0)


@pytest.fixture(scope="module")
def sampler():
    return TextGenerator(shared_model(), tiny_tokenizer(), NEW, top_p=0.95, min_p=0.0, repetition_penalty=1.0)


def text_of(token_ids, tokenizer=None):
    """The text of one row of new tokens, without the end token and the padding behind it."""
    token_ids = np.asarray(token_ids).tolist()
    return (tokenizer or tiny_tokenizer()).decode(token_ids[: token_ids.index(0)] if 0 in token_ids else token_ids)


def texts_of_generate(prompts, **options):
    rows = [tiny_tokenizer().encode(prompt)[-(CONTEXT_LENGTH - NEW) :] for prompt in prompts]
    return [text_of(row) for row in shared_model().generate(rows, max_new_tokens=NEW, **options).numpy()]


# ---- the text


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_k": None},
        pytest.param({"temperature": 0.8, "top_k": 40}, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.3, "top_k": None, "top_p": 0.7}, marks=pytest.mark.slow),
        {"temperature": 1.0, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
)
def test_the_text_is_that_of_the_ids_that_generate_gives(options):
    generator = TextGenerator(shared_model(), tiny_tokenizer(), NEW, **options)
    texts = generator(PROMPTS, seed=5)
    assert texts == texts_of_generate(PROMPTS, seed=5, **options)
    assert len(set(texts)) > len(texts) / 2, "the model must tell the prompts apart"


def test_a_str_gives_a_str_a_list_a_list_and_a_tensor_a_tensor(greedy):
    texts = greedy(PROMPTS)
    assert isinstance(texts, list)
    assert [greedy(prompt) for prompt in PROMPTS] == texts
    assert greedy(tuple(PROMPTS)) == greedy(iter(PROMPTS)) == texts
    tensor = greedy(tf.constant(PROMPTS))
    assert tensor.dtype == tf.string
    assert [text.decode() for text in tensor.numpy()] == texts


def test_no_texts_are_fine(greedy, sampler):
    for generator in (greedy, sampler):
        assert generator([]) == []
        assert generator(tf.zeros([0], tf.string)).shape == [0]
        assert generator([], seed=[]) == []


def test_everything_goes_through_one_trace(sampler):
    sampler(PROMPTS, seed=1)
    sampler("a", temperature=0.3, top_k=3, max_new_tokens=2)
    sampler(tf.constant(PROMPTS), seed=list(range(len(PROMPTS))))
    assert sampler._generate.experimental_get_tracing_count() == 1


def test_it_can_be_part_of_another_graph(greedy):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def shout(text):
        return tf.strings.join([greedy(text), "!"])

    assert [text.decode() for text in shout(tf.constant(PROMPTS[:3])).numpy()] == [
        text + "!" for text in greedy(PROMPTS[:3])
    ]


def test_a_long_text_loses_its_beginning(greedy):
    token_ids = tiny_tokenizer().encode("the cat sat on the mat " * 30)
    kept = tiny_tokenizer().decode(token_ids[-(CONTEXT_LENGTH - NEW) :])
    assert greedy("the cat sat on the mat " * 30) == greedy(kept)
    assert greedy("漢字" * 30 + kept) == greedy(kept)


def test_an_empty_text_starts_from_the_end_token(greedy):
    expected = text_of(shared_model().generate([[0]], max_new_tokens=NEW, temperature=0)[0])
    assert greedy("") == greedy(["", ""])[1] == greedy(["", "the cat sat"])[0] == expected


def test_bytes_that_are_no_utf8_count_as_replacement_characters(greedy):
    broken = [b"caf\xc3", b"\xff\xfe", b"a\x00b", b"\xf0\x9f\x98", b"\xed\xa0\x80"]
    texts = greedy(tf.constant(broken)).numpy()
    assert [text.decode() for text in texts] == greedy([text.decode(errors="replace") for text in broken])
    assert greedy("a\ud800b") == greedy("a\ufffdb")


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_characters_as_tokens_work_too(kind):
    tokenizer = tiny_tokenizer(kind)
    generator = TextGenerator(shared_model(), tokenizer, NEW, temperature=0)
    row = shared_model().generate([tokenizer.encode("the cat")], max_new_tokens=NEW, temperature=0)[0]
    known = [token for token in row.numpy().tolist() if token < tokenizer.vocab_size]
    assert generator("the cat") == text_of(known, tokenizer)


# ---- seeds and options


def test_a_seed_fixes_the_text_of_a_row_alone_or_among_others(sampler):
    seeds = list(range(len(PROMPTS)))
    texts = sampler(PROMPTS, seed=seeds)
    assert texts == [sampler(prompt, seed=seed) for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert texts != sampler(PROMPTS, seed=99)
    assert sampler(["a", "a"], seed=np.array([2**62, 2**62])) == [sampler("a", seed=2**62)] * 2


def test_without_a_seed_each_text_and_each_call_is_new(sampler):
    texts = [*sampler(["the cat"] * 4), *sampler(["the cat"] * 4), "".join(sampler.stream("the cat"))]
    assert len(set(texts)) == len(texts)


def test_the_seed_of_the_pipeline_is_the_default():
    generator = TextGenerator(shared_model(), tiny_tokenizer(), NEW, seed=7)
    assert generator("the cat") == generator("the cat", seed=7) == "".join(generator.stream("the cat"))
    assert generator("the cat") != generator("the cat", seed=8)


def test_a_call_sets_what_the_pipeline_has_on(sampler, greedy):
    assert sampler(PROMPTS, temperature=0) == greedy(PROMPTS)
    assert sampler(PROMPTS, top_k=1) == greedy(PROMPTS)
    assert sampler(PROMPTS, temperature=1.1, top_k=9, top_p=0.5, min_p=0.01, repetition_penalty=1.3, seed=3) == (
        texts_of_generate(PROMPTS, temperature=1.1, top_k=9, top_p=0.5, min_p=0.01, repetition_penalty=1.3, seed=3)
    )
    short = TextGenerator(shared_model(), tiny_tokenizer(), 3, temperature=0)
    assert greedy("the cat", max_new_tokens=3) == short("the cat") != greedy("the cat")


def test_a_call_sets_options_row_by_row(sampler, greedy):
    texts = sampler(["the cat"] * 3, seed=4, temperature=[0.0, 0.8, 1.5], max_new_tokens=tf.constant([12, 12, 2]))
    assert texts[0] == greedy("the cat")
    assert texts[1] == sampler("the cat", seed=4)
    assert texts[2] == sampler("the cat", seed=4, temperature=1.5, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature=-1: must be"),
        ({"temperature": [0.5, float("nan")]}, ValueError, "temperature=nan: must be"),
        ({"top_k": 0}, ValueError, "top_k=0: must be"),
        ({"top_k": 2.5}, ValueError, "top_k=2.5: must be"),
        ({"top_p": 1.5}, ValueError, "top_p=1.5: must be"),
        ({"seed": -1}, ValueError, "seed is -1, but must be an integer from 0"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808"),
        ({"seed": 0.5}, ValueError, "seed is 0.5"),
        ({"seed": [1, 2, 3]}, ValueError, "seed has 3 values for 2 texts"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0, but this pipeline gives 1 to 12"),
        ({"max_new_tokens": 13}, ValueError, "max_new_tokens is 13"),
        ({"top_n": 3}, TypeError, "no option 'top_n'.*takes: seed, max_new_tokens, temperature"),
    ],
)
def test_wrong_options_of_a_call_are_named(sampler, options, error, message):
    with pytest.raises(error, match=message):
        sampler(["a", "b"], **options)


def test_an_option_that_the_pipeline_was_made_without_is_refused(greedy):
    with pytest.raises(ValueError, match=r"top_p is 0.5, but this pipeline was made without it: make it with a value"):
        greedy("a", top_p=0.5)
    with pytest.raises(ValueError, match=r"temperature is 0.5, but this pipeline was made without it"):
        greedy("a", temperature=0.5)


@pytest.mark.parametrize("text", [b"bytes", 3, ["a", b"bytes"], [None]])
def test_what_is_no_text_is_refused(greedy, text):
    with pytest.raises(TypeError):
        greedy(text)
    with pytest.raises(TypeError):
        greedy.stream(text)


@pytest.mark.parametrize("text", [tf.constant("a"), tf.constant([["a"]]), tf.constant([1])])
def test_a_tensor_of_another_shape_or_type_is_refused(greedy, text):
    with pytest.raises(TypeError, match=r"must be tf.string \[B\]"):
        greedy(text)


# ---- making one


def test_a_tokenizer_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match=r"300 tokens \(tokenizer.vocab_size\).* 299 \(config.vocab_size\)"):
        TextGenerator(tiny_model(vocab_size=299), tiny_tokenizer(), NEW)


@pytest.mark.parametrize("max_new_tokens", [0, -1, CONTEXT_LENGTH, 2.0])
def test_new_tokens_that_leave_no_room_for_a_prompt_are_refused(max_new_tokens):
    with pytest.raises(ValueError, match=f"max_new_tokens is {max_new_tokens}, but must be an integer from 1 to 47"):
        TextGenerator(shared_model(), tiny_tokenizer(), max_new_tokens)


def test_a_model_that_does_not_continue_texts_is_refused():
    encoder = BertModel.from_preset("bert-tiny", vocab_size=60, num_layers=1)
    tokenizer = Tokenizer.train(iter(["the cat sat on the mat"]), kind="wordpiece", vocab_size=60)
    with pytest.raises(ValueError, match="BertModel does not continue texts"):
        TextGenerator(encoder, tokenizer, NEW)


def test_a_tokenizer_without_a_twin_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1}, unk_token="the"))
    tokenizer = Tokenizer(backend)
    with pytest.raises(ValueError, match="no in-graph twin: its model is WordLevel"):
        TextGenerator(shared_model(), tokenizer, NEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": ["a", ""]}, "stop_strings has '', but each must be a str of one character or more"),
        ({"stop_strings": [3]}, "stop_strings has 3"),
        ({"stop_strings": "a<|endoftext|>"}, "mixes text and special tokens"),
        ({"stop_sequences": [[]]}, "each must hold one token id or more"),
        ({"temperature": -1}, "temperature=-1: must be"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TextGenerator(shared_model(), tiny_tokenizer(), NEW, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run as its files are: a checkpoint with its tokenizer, and `best` that points to it."""
    directory = tmp_path_factory.mktemp("run")
    shared_model().save_pretrained(directory / "checkpoints" / "step-4")
    tiny_tokenizer().save_pretrained(directory / "checkpoints" / "step-4")
    (directory / "best").symlink_to(directory / "checkpoints" / "step-4")
    return directory


def test_a_checkpoint_and_a_run_are_loaded_with_their_tokenizer(run, greedy):
    checkpoint = TextGenerator.from_pretrained(run / "best", max_new_tokens=NEW, temperature=0)
    assert checkpoint(PROMPTS) == greedy(PROMPTS)
    options = SamplingOptions(temperature=0, stop_sequences=((5,),))
    settings_ = dataclasses.asdict(options)
    assert TextGenerator.from_pretrained(str(run), max_new_tokens=NEW, **settings_).options == options
    assert TextGenerator.from_pretrained(run, dtype="bfloat16", max_new_tokens=NEW).model.compute_dtype == "bfloat16"


def test_a_directory_without_a_checkpoint_or_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a checkpoint .* nor a run"):
        TextGenerator.from_pretrained(tmp_path)
    shared_model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        TextGenerator.from_pretrained(tmp_path)


# ---- where a text ends, and streams


class Scripted:
    """A greedy pipeline around a script, and what it should give."""

    def __init__(self, eos_token_id=0, tokenizer=None, **settings):
        self.model = ScriptedModel(eos_token_id=eos_token_id)
        self.generator = TextGenerator(self.model, tokenizer or tiny_tokenizer(), 40, temperature=0, **settings)

    def check(self, token_ids, expected):
        self.model.play(token_ids)
        assert self.generator("") == expected
        pieces = list(self.generator.stream(""))
        assert "".join(pieces) == expected
        assert all(pieces)
        return pieces


@pytest.fixture(scope="module")
def scripted():
    return Scripted(stop_strings=STOPS)


def cut(text):
    return text[: min((text.index(stop) for stop in STOPS if stop in text), default=len(text))]


@settings(max_examples=60)
@given(st.text("ab é\n漢字😀", max_size=14))
def test_a_text_ends_before_the_first_stop_string_and_is_streamed_in_whole_characters(scripted, text):
    scripted.check(tiny_tokenizer().encode(text), cut(text))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 299), max_size=16))
def test_any_tokens_are_streamed_as_the_call_gives_them(scripted, token_ids):
    # Single tokens of other languages are pieces of characters, so most of these texts are broken somewhere.
    scripted.check(token_ids, cut(tiny_tokenizer().decode(token_ids)))


@pytest.mark.slow
@settings(max_examples=500)
@given(st.lists(st.sampled_from([token for char in "ab é\n漢字😀" for token in tiny_tokenizer().encode(char)])))
def test_any_shuffled_bytes_are_streamed_as_the_call_gives_them(scripted, token_ids):
    scripted.check(token_ids, cut(tiny_tokenizer().decode(token_ids[:40])))


def test_a_piece_comes_as_soon_as_it_is_certain(scripted):
    token_ids = tiny_tokenizer().encode("the a") + tiny_tokenizer().encode("😀") + tiny_tokenizer().encode("bc")
    assert len(tiny_tokenizer().encode("😀")) > 1, "the tokenizer must cut this character in pieces"
    # "a" may begin a stop string until something else comes.
    assert scripted.check(token_ids, "the a😀bc") == ["the", " ", "a😀", "bc"]
    scripted.model.play(token_ids)
    stream = scripted.generator.stream("")
    next(stream)
    assert scripted.model.num_steps == 1


@pytest.mark.parametrize("stop", ["the", " the", "b", "cat"])
def test_a_stop_string_ends_the_loop_early(stop):
    scripted = Scripted(stop_strings=stop)
    text = "a b the cat sat on the mat"
    token_ids = tiny_tokenizer().encode(text)
    scripted.check(token_ids, text[: text.index(stop)])
    num_needed = next(n for n in range(99) if stop in tiny_tokenizer().decode(token_ids[:n]))
    for generate in (scripted.generator, lambda text: "".join(scripted.generator.stream(text))):
        scripted.model.play(token_ids)
        generate("")
        assert scripted.model.num_steps == num_needed


def test_a_stop_string_that_overlaps_itself_is_found_at_its_first_place():
    scripted = Scripted(stop_strings="aa")
    a, b = (tiny_tokenizer().token_to_id(token) for token in "ab")
    scripted.check([b, a, b, a, a, a, b], "bab")


def test_a_stop_string_in_other_tokens_than_its_own_is_cut_with_all_that_follows():
    assert len(tiny_tokenizer().encode("the")) == 1
    letters = [tiny_tokenizer().token_to_id(token) for token in "athe"]
    Scripted(stop_strings="the").check([*letters, *tiny_tokenizer().encode("\n\nb\n")], "a")


def test_a_stop_string_that_the_tokenizer_cannot_write_ends_nothing():
    tokenizer = tiny_tokenizer("char")
    scripted = Scripted(stop_strings=["Ж", "Жa"], tokenizer=tokenizer)
    assert tokenizer.encode("Ж") == [tokenizer.unk_token_id]
    scripted.check([*tokenizer.encode("a"), tokenizer.unk_token_id, *tokenizer.encode("b")], "ab")


def test_end_tokens_of_the_model_and_of_the_tokenizer_end_a_text_and_are_not_in_it():
    newline, *_ = tiny_tokenizer().encode("\n")
    token_ids = tiny_tokenizer().encode("the cat\nsat")
    tail = tiny_tokenizer().encode("sat")
    Scripted(eos_token_id=newline).check(token_ids, "the cat")
    Scripted(eos_token_id=newline).check([*tail, 0, *tail], "sat")
    Scripted(eos_token_id=None).check([*tail, 0, *tail], "sat")
    Scripted(eos_token_id=0).check([*token_ids, 0, *tail], "the cat\nsat")


def test_a_special_token_can_be_a_stop_string():
    scripted = Scripted(eos_token_id=1, stop_strings=["<|endoftext|>"])
    tail = tiny_tokenizer().encode("sat")
    scripted.check([*tail, 0, *tail], "sat")


def test_a_stop_sequence_of_ids_stays_in_the_text():
    ids = tiny_tokenizer().encode("the cat sat on")
    cat = tiny_tokenizer().encode(" cat")
    Scripted(stop_sequences=[cat]).check(ids, "the cat")


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9, "max_new_tokens": 4}])
def test_a_stream_gives_the_text_of_the_call(sampler, options):
    for seed, prompt in enumerate(PROMPTS):
        assert "".join(sampler.stream(prompt, seed=seed, **options)) == sampler(prompt, seed=seed, **options)


def test_a_stream_refuses_wrong_arguments_at_once(sampler):
    with pytest.raises(ValueError, match="top_k=0"):
        sampler.stream("a", top_k=0)
    with pytest.raises(ValueError, match="seed has 2 values for 1 texts"):
        sampler.stream("a", seed=[1, 2])
