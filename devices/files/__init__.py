"""Folders and files that survive a kill, a full disk and a second process: where things lie, safe writing, locks."""
