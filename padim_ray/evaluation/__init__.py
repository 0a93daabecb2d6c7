"""Evaluation: metrics, tables and curves on labelled images; agreement of two models."""
