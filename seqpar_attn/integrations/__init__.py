"""What other libraries call: their spellings and conventions live here and nowhere else. Import the one you need."""
