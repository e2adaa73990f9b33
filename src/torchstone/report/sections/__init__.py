"""The sections of the HTML page, one idea a file. Each function returns markup, or None when it has nothing
to show."""
