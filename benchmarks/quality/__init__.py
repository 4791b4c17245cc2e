"""Judges the pictures of a bundle: is the subject recognizable, is it where the prompt says, does the mask fit it?"""
