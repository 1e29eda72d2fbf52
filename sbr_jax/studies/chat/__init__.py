"""Study of a chat model: real data in its template, benchmarks and a monitor."""

from sbr_jax.studies.chat.study import ChatStudy, build_study

__all__ = ["ChatStudy", "build_study"]
