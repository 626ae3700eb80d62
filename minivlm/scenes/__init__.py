"""The drawn world: facts, drawing, language in English and Chinese, reading facts back, rows."""
