"""The numbers by which the field compares fine-tuned models, from labels and predictions of a whole part at once.

The libraries are imported where they are used: loading them takes a second, which no other recipe should pay.
"""

from __future__ import annotations

import collections
import re
import string
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

Scores = dict[str, float]


def classification_scores(labels: Any, predictions: Any, num_labels: int) -> Scores:
    """Accuracy, F1 and Matthews' correlation, as in GLUE.

    Args:
        labels, predictions: numbers of classes, [N].
        num_labels: of two classes, f1 is that of class 1; of more, the mean over all that occur (macro_f1 always is).
    """
    import sklearn.metrics

    macro = float(sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0.0))
    f1 = macro
    if num_labels == 2:
        f1 = float(sklearn.metrics.f1_score(labels, predictions, labels=[1], average="macro", zero_division=0.0))
    return {
        "accuracy": float(sklearn.metrics.accuracy_score(labels, predictions)),
        "f1": f1,
        "macro_f1": macro,
        "matthews": float(sklearn.metrics.matthews_corrcoef(labels, predictions)),
    }


def multi_label_scores(labels: np.ndarray, predictions: np.ndarray) -> Scores:
    """F1 over all decisions, mean F1 of the labels, and the share of examples with all labels right.

    Shapes:
        labels, predictions: [N, C], 0 or 1.
    """
    import sklearn.metrics

    micro, macro = (
        float(sklearn.metrics.f1_score(labels, predictions, average=average, zero_division=0.0))
        for average in ("micro", "macro")
    )
    exact = float((np.asarray(labels) == np.asarray(predictions)).all(axis=1).mean())
    return {"micro_f1": micro, "macro_f1": macro, "exact_match": exact}


def regression_scores(labels: np.ndarray, predictions: np.ndarray) -> Scores:
    """Pearson's and Spearman's correlation and the mean squared error; means over columns if there are several.

    The correlation with what is always the same is 0 here.

    Shapes:
        labels, predictions: [N] or [N, C].
    """
    import scipy.stats

    truth, given = (np.asarray(values, np.float64).reshape(len(values), -1) for values in (labels, predictions))
    columns = list(zip(truth.T, given.T, strict=True))
    return {
        "pearson": float(np.mean([_correlation(scipy.stats.pearsonr, *column) for column in columns])),
        "spearman": float(np.mean([_correlation(scipy.stats.spearmanr, *column) for column in columns])),
        "mse": float(np.mean(np.square(truth - given))),
    }


def _correlation(measure: object, one: np.ndarray, two: np.ndarray) -> float:
    assert callable(measure)
    if len(one) < 2 or np.ptp(one) == 0.0 or np.ptp(two) == 0.0:
        return 0.0
    return float(measure(one, two)[0])


def entity_scores(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Scores:
    """Precision, recall and F1 of whole entities, by seqeval, over all and of each kind; accuracy is that of words.

    An entity counts if its words and its kind are all right. Tags are IOB2's and its kin's; others are kinds by
    themselves, each word an entity.

    Args:
        labels, predictions: tags of the words of each record.
    """
    from seqeval.metrics import classification_report

    words = [
        (one, two) for row, other in zip(labels, predictions, strict=True) for one, two in zip(row, other, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # seqeval warns of tags without a prefix, and of kinds that are never predicted.
        report = classification_report(
            [list(map(_prefixed, row)) for row in labels],
            [list(map(_prefixed, row)) for row in predictions],
            output_dict=True,
            zero_division=0,
        )
    scores = {name: float(report["micro avg"][key]) for name, key in _SEQEVAL.items()}
    scores["accuracy"] = sum(one == two for one, two in words) / len(words)
    kinds = (kind for kind in report if not kind.endswith(" avg"))
    return scores | {f"f1_{kind}": float(report[kind]["f1-score"]) for kind in kinds}


_SEQEVAL = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
_PREFIX = re.compile(r"[BIESLU]-.+|O")


def _prefixed(tag: str) -> str:
    return tag if _PREFIX.fullmatch(tag) else f"B-{tag}"


def answer_scores(answers: Sequence[str], gold: Sequence[Sequence[str]]) -> Scores:
    """SQuAD's exact match and F1, shares from 0 to 1; where some questions have no answer, of both kinds too.

    Args:
        answers: text given for each question, empty for no answer.
        gold: the texts that count as right; none if there is no answer.

    Reference: Rajpurkar et al. 2016, "SQuAD", section 6.1, and 2018, "Know What You Don't Know", section 4.
    """
    exact = np.array(
        [
            max(float(_words(given) == _words(each)) for each in right or [""])
            for given, right in zip(answers, gold, strict=True)
        ]
    )
    overlap = np.array(
        [max(_overlap(given, each) for each in right or [""]) for given, right in zip(answers, gold, strict=True)]
    )
    answered = np.array([bool(right) for right in gold])
    scores = {"exact_match": float(exact.mean()), "f1": float(overlap.mean())}
    if 0 < answered.sum() < len(gold):
        scores |= {
            "has_answer_exact_match": float(exact[answered].mean()),
            "has_answer_f1": float(overlap[answered].mean()),
            "no_answer_accuracy": float(exact[~answered].mean()),
        }
    return scores


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _overlap(given: str, right: str) -> float:
    """F1 of the words that two texts have in common; for texts without words, whether both have none."""
    one, two = _words(given), _words(right)
    if not one or not two:
        return float(one == two)
    common = sum((collections.Counter(one) & collections.Counter(two)).values())
    return 2.0 * common / (len(one) + len(two))


def text_scores(targets: Sequence[str], texts: Sequence[str]) -> Scores:
    """How near texts come to their targets: BLEU and chrF from 0 to 100 by sacreBLEU, ROUGE's F1 from 0 to 1, by
    rouge-score, which knows ASCII letters and digits only, and the share of texts that are their targets.

    Args:
        targets: one for each text.
        texts: what was written.

    Reference: Post 2018, "A Call for Clarity in Reporting BLEU Scores"; Popović 2015, "chrF"; Lin 2004, "ROUGE".
    """
    import sacrebleu
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(_ROUGE)
    rouge = [scorer.score(target, text) for target, text in zip(targets, texts, strict=True)]
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), [list(targets)]).score,
        "chrf": sacrebleu.corpus_chrf(list(texts), [list(targets)]).score,
        **{name: float(np.mean([score[name].fmeasure for score in rouge])) for name in _ROUGE},
        "exact_match": float(np.mean([target == text for target, text in zip(targets, texts, strict=True)])),
    }


_ROUGE = ("rouge1", "rouge2", "rougeL")


def retrieval_scores(texts: np.ndarray, pairs: np.ndarray) -> Scores:
    """Of how many texts the nearest of all second texts, by cosine, is their own: accuracy, and the mean of 1 / rank.

    Shapes:
        texts, pairs: [N, D].
    """
    one, two = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12) for vectors in (texts, pairs))
    hits, reciprocal = 0, 0.0
    for start in range(0, len(one), _ROWS_AT_ONCE):
        cosines = one[start : start + _ROWS_AT_ONCE] @ two.T
        own = np.take_along_axis(cosines, start + np.arange(len(cosines))[:, None], axis=1)
        ranks = (cosines > own).sum(axis=1) + 1
        hits, reciprocal = hits + int((ranks == 1).sum()), reciprocal + float((1.0 / ranks).sum())
    return {"accuracy": hits / len(one), "mrr": reciprocal / len(one)}


_ROWS_AT_ONCE = 1024
