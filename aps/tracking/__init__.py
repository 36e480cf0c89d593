"""Sends runs to MLflow, where people compare them. Only this package and aps/inference/serving.py import mlflow.

    addresses.py   which server or store, and what of it may be shown
    describing.py  what a run is called, its parameters, tags, datasets and cost: plain data
    state.py       tracking.json: what was sent of a run
    server.py      a server or store: finds, restores or creates its experiments and runs
    sending.py     sends what MLflow lacks of one run, each point once
    tracker.py     a thread that sends while the stage runs, and never delays it
    system.py      how busy processor, GPU and memory are, sampled while the stage runs
    syncing.py     sends what MLflow lacks of finished runs; the report
    views.py       the tables and plots that MLflow's page shows first, and their addresses
    browsing.py    how to open MLflow's page, and its server for a store that has none
    reasons.py     why a server did not take something, in one clause

Design: the journal, history.jsonl, comes first. What MLflow already has is asked of MLflow and not remembered. So each
point is sent once, even if a process was killed between a request and its answer.
"""
