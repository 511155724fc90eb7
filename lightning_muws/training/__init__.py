"""How weights get their structure, in plain torch: a method such as ADMM, then retraining inside the structure."""
