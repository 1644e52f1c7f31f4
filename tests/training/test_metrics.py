"""Against numbers worked out by hand."""

import numpy as np
import pytest

from lmzoo.training.metrics import (
    answer_scores,
    classification_scores,
    entity_scores,
    multi_label_scores,
    regression_scores,
    retrieval_scores,
)


def test_classification():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    labels = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    predictions = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    scores = classification_scores(labels, predictions, num_labels=2)
    f1_of_zero = 2 * 4 / (2 * 4 + 2 + 1)
    assert scores == pytest.approx(
        {
            "accuracy": 0.7,
            "f1": 2 * 3 / (2 * 3 + 1 + 2),
            "macro_f1": (2 / 3 + f1_of_zero) / 2,
            "matthews": (3 * 4 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2)),
        }
    )
    three = classification_scores([0, 1, 2, 2], [0, 2, 2, 2], num_labels=3)
    assert three["f1"] == three["macro_f1"] == pytest.approx((1.0 + 0.0 + 0.8) / 3)
    always = classification_scores([0, 1], [0, 0], num_labels=2)
    assert (always["f1"], always["matthews"]) == (0.0, 0.0)


def test_several_labels():
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    predictions = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    scores = multi_label_scores(labels, predictions)
    assert scores == pytest.approx({"micro_f1": 4 / 6, "macro_f1": (1.0 + 2 / 3 + 0.0) / 3, "exact_match": 1 / 3})


def test_regression():
    scores = regression_scores(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    assert scores["pearson"] == pytest.approx(8.0 / np.sqrt(2.0 * 98 / 3))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["mse"] == pytest.approx((0 + 4 + 36) / 3)
    columns = regression_scores(np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([[0.0, 9.0], [1.0, 3.0]]))
    assert columns["pearson"] == pytest.approx(0.0)
    constant = regression_scores(np.array([1.0, 2.0]), np.array([5.0, 5.0]))
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


def test_entities_count_as_wholes():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "O"]]
    predictions = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC", "B-LOC"]]
    scores = entity_scores(labels, predictions)
    assert scores["precision"] == pytest.approx(2 / 4)  # Ada alone is not Ada Lovelace, and one place too many.
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(4 / 7)
    assert scores["f1_LOC"] == pytest.approx(0.8)
    assert scores["f1_PER"] == 0.0
    assert scores["accuracy"] == pytest.approx(5 / 7)
    plain = entity_scores([["NOUN", "VERB"]], [["NOUN", "NOUN"]])
    assert plain["accuracy"] == 0.5
    assert plain["f1_NOUN"] == pytest.approx(2 / 3)


def test_answers():
    given = ["The  Eiffel Tower!", "in Paris", "", "London", ""]
    gold = [["Eiffel tower"], ["Rome", "Paris, France"], [], [], ["Ada"]]
    scores = answer_scores(given, gold)
    assert scores["exact_match"] == pytest.approx((1 + 0 + 1 + 0 + 0) / 5)
    assert scores["f1"] == pytest.approx((1 + 0.5 + 1 + 0 + 0) / 5)
    assert scores["has_answer_exact_match"] == pytest.approx(1 / 3)
    assert scores["has_answer_f1"] == pytest.approx(1.5 / 3)
    assert scores["no_answer_accuracy"] == 0.5
    assert answer_scores(["a b b c"], [["b b d"]])["f1"] == pytest.approx(2 * 2 / (3 + 3))  # "a" is an article.
    assert set(answer_scores(["x"], [["x"]])) == {"exact_match", "f1"}


def test_retrieval():
    texts = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    pairs = np.array([[1.0, 0.1], [1.0, 0.0], [5.0, 5.0]])
    # The second text is nearest to the third pair, then to the first, then to its own.
    scores = retrieval_scores(texts, pairs)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
