"""JSON schemas as grammars: whatever the grammar writes is a document the schema allows."""
