"""The Space that shows this metric in a browser."""

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load("vqa_accuracy.py"))
