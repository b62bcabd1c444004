"""Tests of the systems that are compared."""
