"""Results for people: tables, charts, pictures and HTML pages."""
