"""MLflow, second to the journal: how people compare runs. The only room that imports mlflow.

    addresses.py   which server or store, and what of it may be shown
    describing.py  what a run is called, its parameters, tags, datasets and cost: plain data
    state.py       tracking.json: how far a run got in MLflow
    server.py      a server or store: its experiments and runs, found, restored or made
    sending.py     one run brought up to date, each point once
    tracker.py     a thread beside the training that sends, and never holds it up
    system.py      what the machine is busy with, sampled beside the training
    syncing.py     what MLflow missed of finished runs; the report
    views.py       the tables and plots that MLflow's page opens with, and their addresses
    reasons.py     why a server did not take something, in one clause

Design: history.jsonl comes first, MLflow second. The journal is never written for MLflow's sake, and what MLflow has is
asked of MLflow, not remembered: so a point is sent once, whatever was killed between a request and its answer.
"""
