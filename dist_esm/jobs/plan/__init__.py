"""`job=plan`: what a run would do, without doing it; and what every run says before it begins."""
