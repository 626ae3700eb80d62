"""Evaluation: how good a model's answers are, measured against the exact facts of drawn pictures.

Metrics with intervals; the questions of the exam and of POPE; the exam with its controls and their chance level; three
small experiments on hallucination.
"""

from minivlm.evaluation.ablations import EXPERIMENTS, VARIANTS, Effect, effect, estimate_of, score, values
from minivlm.evaluation.exam import CONTROLLED, CONTROLS, EVERYONE, LONG, SHORT, Exam, evaluate, prepare_exam
from minivlm.evaluation.metrics import Estimate, compare, estimate, score_descriptions, score_pope, score_questions
from minivlm.evaluation.questions import POPE_SAMPLINGS, Reply, exam_questions, is_right, normalised, pope_questions
