"""Logs of finished runs -> the folder of the contest's pull request."""
