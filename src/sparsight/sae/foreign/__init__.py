"""SAEs of other tools: a file for each format, and the stage that imports and checks one."""
