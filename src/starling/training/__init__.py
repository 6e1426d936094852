"""The loop: collect, update, report, save; and the folder that a run leaves behind."""
