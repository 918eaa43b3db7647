"""`beaver-ray bridge`: tasks of other evaluation programs, run by those programs themselves on a policy of ours.

`cli` holds the commands and imports nothing heavy; `policy` is what both programs ask, and where their scores go;
`lm_eval_tasks` and `inspect_tasks` import the optional packages, one each.
"""
