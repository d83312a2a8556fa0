"""RecordIO, the format of insightface's training sets: reader and writer, index, source."""
