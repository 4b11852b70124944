"""Policies that other projects trained."""
