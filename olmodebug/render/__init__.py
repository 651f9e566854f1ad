"""Pictures of a report, drawn from the report alone: nothing here measures, judges or imports torch."""
