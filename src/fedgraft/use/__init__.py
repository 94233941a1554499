"""Using what was trained: live models of a run or an export, text written with them, files for other tools."""
