"""Texts to batches.

records, formats, chats   files to records, records to what is learned from them, conversations to text
encode                    records to tokens
documents                 the tokens of files, made once
packing, stream           tokens to rows, rows to an endless, resumable stream of batches
lessons                   rows that teach a memory to be used
prompts                   what the student is to answer
books                     the demo's texts
"""

__all__ = ["books", "documents", "encode", "lessons", "prompts", "records", "stream"]
