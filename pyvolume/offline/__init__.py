"""Commands on the files of volumes that no server has open: check, fix, export, compact.

Between cli and storage: must not import server or ops. Each command is a module with `add_arguments(parser)` and
`run(job) -> None`; common has what they share. Exit codes: 0 clean, 1 there are findings, 2 could not run.
"""
