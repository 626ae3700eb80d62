"""Widgets: a chat, explorers of drawn scenes, and what a stage trains.

All controls work by keyboard; what they show is text in HTML, Chinese included. Without a kernel a widget is empty, so
a notebook shows a figure of the same before it.
"""
