"""What a job would take, before it costs money: survey, speed, formulas. No Ray."""
