"""What surrounds a stage that computes: processes, signals, Slurm, precision, checkpoints, compiling, traces, memory.

Stages, the workflow and the command line use it. It knows no stage.
"""
