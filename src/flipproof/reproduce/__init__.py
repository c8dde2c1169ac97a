"""The papers' tables and figures at two scales, with the published numbers beside ours.

One module a paper. Each has `SUMMARY`, one line for the command line, and
`reproduce(*, scale, data_root, out, workers, console)`, which writes its tables and figures into the folder `out`,
keeps its journals there so that an interrupted run resumes, and prints what it claims and whether the claim holds.
"""

from flipproof.reproduce.published import beside, write_table

__all__ = ["beside", "write_table"]
