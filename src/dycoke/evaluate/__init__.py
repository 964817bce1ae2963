"""Accuracy: StoryQA with its intervals."""
