"""Pretrained weights: a module for each file format behind one interface."""
