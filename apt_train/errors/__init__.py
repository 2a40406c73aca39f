"""What a run does when something fails: log, report, recover, or stop on all ranks."""
