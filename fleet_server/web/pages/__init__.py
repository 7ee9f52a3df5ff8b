"""The pages, a subject a file: each asks the API and fills a template. None has a rule of its own."""
