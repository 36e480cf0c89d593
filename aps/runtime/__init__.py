"""Services for every stage: processes, signals, Slurm, precision, checkpoints, compiling, traces, memory.

Stages, the workflow and the command line use them. They know no stage.
"""
