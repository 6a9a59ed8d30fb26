"""Tables, CSV files, figures, journals of finished rows and progress, shared by all questions."""
