"""The second stage: a frozen teacher's features are the lesson of a smaller student."""
