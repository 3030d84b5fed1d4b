"""Airflow DAGs, drawn from the pipeline graph (thin; no torch)."""
