"""A real Slurm cluster on one Linux machine: `with Cluster(hosts=2) as cluster: cluster.sbatch(...)`."""

from tests.cluster.slurm import Cluster, Job, why_not

__all__ = ["Cluster", "Job", "why_not"]
