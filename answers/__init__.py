"""Answers about single images: their classes (predict), their features (embed), and which to label next (suggest).

| module | idea |
| --- | --- |
| `command` | what a command does, from the images to its file |
| `images` | which images it is about |
| `questions` | what is asked about each: its class, or its features |
| `every_image` | a network's answers on every image, those that cannot be read named |
| `suggestion` | which images to label |
| `tables` | tables that survive an interruption, and their files |
| `spreadsheet` | texts that are no formulas |
"""

from answers.command import answer

__all__ = ["answer"]
