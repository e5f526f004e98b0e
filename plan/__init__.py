"""What a run takes, before anything is built, and whether it fits.

| module | idea |
| --- | --- |
| `figures` | parameters, FLOPs, steps, memory and time of a run |
| `footprint` | parameters, FLOPs and memory of a network, from the shapes of its layers; batches that cannot fit |
| `fit` | what fits a run into a memory, and what it costs in time |
"""

from plan.figures import plan, table

__all__ = ["plan", "table"]
