"""Tables, figures and pages: functions of records."""
