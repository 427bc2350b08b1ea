"""`headfoundry ablation`: train variants of the reconstructor, measure all in the same way, and print the table."""

from reconstructor.ablation import AblationRun, run_ablation

CONFIG = AblationRun
main = run_ablation
