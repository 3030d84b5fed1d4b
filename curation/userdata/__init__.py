"""What users have, read as samples: folders, tars, tables, Hugging Face data sets, videos."""
