"""Plans jobs for TPUs that are not there: the real compiler says whether a job fits, and what it should cost."""

from jaxmllm.planning.plan import JobPlan, MeshPlan, plan_job
from jaxmllm.planning.work import Work

__all__ = ["JobPlan", "MeshPlan", "Work", "plan_job"]
