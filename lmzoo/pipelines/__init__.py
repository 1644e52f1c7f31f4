"""Pipelines: strings in; texts, labels, spans or vectors out, in one graph. What is called in Python is served."""

from lmzoo.pipelines.base import Pipeline as Pipeline
from lmzoo.pipelines.loading import find_pipeline as find_pipeline
from lmzoo.pipelines.loading import load_pipeline as load_pipeline
from lmzoo.pipelines.mask_filler import MaskFiller as MaskFiller
from lmzoo.pipelines.question_answerer import QuestionAnswerer as QuestionAnswerer
from lmzoo.pipelines.text_classifier import TextClassifier as TextClassifier
from lmzoo.pipelines.text_embedder import TextEmbedder as TextEmbedder
from lmzoo.pipelines.text_generator import TextGenerator as TextGenerator
from lmzoo.pipelines.text_to_text import TextToText as TextToText
from lmzoo.pipelines.token_classifier import TokenClassifier as TokenClassifier
