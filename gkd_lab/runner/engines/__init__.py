"""Engines that run the units of a grid on other machines: they place, restart and limit; records decide.

`driver` submits what is neither done nor alive and follows it; `slurm` speaks to Slurm. Nothing here loads
torch, and nothing is pickled: what a job runs is the command line of one unit.
"""
