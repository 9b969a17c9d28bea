"""Search on a real teacher, bank and task: `dtr.selection` decides, this room makes and scores the hybrids."""
